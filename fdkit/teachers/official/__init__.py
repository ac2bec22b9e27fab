"""Official checkpoint layouts: a file of weights is recognised by what is in it, and read as exactly that network.

Each module holds the layouts of one kind of network. A layout says which tensors show it, which tensors of the file
are no part of the network and why, and what the others are called in the timm model of the same architecture.
"""

from fdkit.teachers.official._layout import Change, Layout, Network, Reading
from fdkit.teachers.official.beit import LAYOUTS as BEIT
from fdkit.teachers.official.clip import LAYOUTS as CLIP
from fdkit.teachers.official.convnext import LAYOUTS as CONVNEXT
from fdkit.teachers.official.huggingface import LAYOUTS as HUGGINGFACE
from fdkit.teachers.official.resnet import LAYOUTS as RESNET
from fdkit.teachers.official.swin import LAYOUTS as SWIN
from fdkit.teachers.official.vit import LAYOUTS as VIT

LAYOUTS: tuple[Layout, ...] = (*VIT, *BEIT, *SWIN, *CONVNEXT, *RESNET, *CLIP, *HUGGINGFACE)
"""All of them; a file is the first that recognises it, and a test holds that no second one does."""

__all__ = ["LAYOUTS", "Change", "Layout", "Network", "Reading"]
