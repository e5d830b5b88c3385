"""The primitives as Triton kernels; being written."""

AVAILABLE = False


def serves(device: str, dtype: object) -> bool:
    """Tell whether the kernels run on this kind of device and type."""
    return False
