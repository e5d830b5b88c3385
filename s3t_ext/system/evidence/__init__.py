"""What a claim of forgetting rests on: an oracle, canaries, membership inference, isolation, residue on disk."""
