"""PEFT in and out. PEFT itself is imported inside the functions that need it, never by importing this package."""

from s3t_ext.lora.peft.files import to_peft
from s3t_ext.lora.peft.model import MaskedLoRAModel, from_peft

__all__ = ["MaskedLoRAModel", "from_peft", "to_peft"]
