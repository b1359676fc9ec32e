"""The losses of the Dice family without a framework: options, checks, formulas, configuration.

Each framework derives a `SumsLoss` from the one here and from a base of its own, and then each loss
from the one here and from that.
"""

from dice_op._family.base import LogitsFirst, SumsLoss
from dice_op._family.cross_entropy import (
    DiceCELoss,
    DiceFocalLoss,
    GeneralizedDiceFocalLoss,
    UnifiedFocalLoss,
)
from dice_op._family.overlap import (
    DiceLoss,
    GeneralizedDiceLoss,
    GeneralizedWassersteinDiceLoss,
    MatthewsLoss,
    OverlapLoss,
    TverskyLoss,
)

__all__ = [
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "GeneralizedWassersteinDiceLoss",
    "LogitsFirst",
    "MatthewsLoss",
    "OverlapLoss",
    "SumsLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
]
