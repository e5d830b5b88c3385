"""The masked-stack LoRA op and what is built on it alone: layers, optimizer, counter-based streams."""
