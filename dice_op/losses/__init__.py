"""Keras losses of the Dice family over the fused sums."""

from dice_op.losses._base import SumsLoss
from dice_op.losses._classes import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    GeneralizedWassersteinDiceLoss,
    MatthewsLoss,
    OverlapLoss,
    TverskyLoss,
    UnifiedFocalLoss,
)
from dice_op.losses._deep_supervision import DownsampledLabels, deep_supervision

__all__ = [
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "DownsampledLabels",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "GeneralizedWassersteinDiceLoss",
    "MatthewsLoss",
    "OverlapLoss",
    "SumsLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "deep_supervision",
]

# Saved models and pickles name the module of a loss: it is this one, whichever file the loss is in.
for _name in __all__:
    globals()[_name].__module__ = __name__
