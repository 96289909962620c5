"""Names of torchvision, for importing SGLang where torchvision is not installed; a text model calls none of them.

All submodules are made here: any name asked of them is a class that refuses to be made.
"""

import enum
import sys
import types

__version__ = "0.0.0"


class InterpolationMode(enum.Enum):
    """Transformers looks at its members while it is imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(f"{__name__}.{name}")

    def attribute(wanted: str) -> type:
        if wanted.startswith("__"):
            raise AttributeError(wanted)

        def refuse(self, *args, **options):
            raise NotImplementedError(f"{module.__name__}.{wanted} is only a name in the tests' stand-in")

        return type(wanted, (), {"__init__": refuse})

    module.__dict__.update({"__getattr__": attribute, "__path__": [], "InterpolationMode": InterpolationMode})
    sys.modules[module.__name__] = module
    return module


io, transforms = _module("io"), _module("transforms")
transforms.functional = _module("transforms.functional")
transforms.v2 = _module("transforms.v2")
transforms.v2.functional = _module("transforms.v2.functional")
