"""What batch norms ask of the batch, for the methods that have some."""

from torch.nn.modules.batchnorm import _BatchNorm

from fdkit.errors import ConfigError
from fdkit.methods._method import Duration, Method


def check_batch_norm(method: Method, duration: Duration) -> None:
    """Raises ConfigError if a batch norm of the method, synchronised over all ranks, would see a single image."""
    num_images = duration.part_size * duration.world_size
    if num_images >= 2:
        return
    name = next((name for name, module in method.named_modules() if isinstance(module, _BatchNorm)), None)
    if name is None:
        return
    parts = f" in parts of {num_images}" if duration.batch_size > num_images else ""
    raise ConfigError(
        f"train.batch_size {duration.batch_size}{parts}: a batch norm ({name}) cannot normalise a single image",
        "use a larger --train.batch-size, or a smaller --train.accumulate"
        if parts
        else "use --train.batch-size 2 or more",
    )
