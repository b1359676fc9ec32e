"""The losses of the family as losses of Keras, which saves them by the names here."""

from __future__ import annotations

import typing

import keras

from dice_op import _family
from dice_op.losses._base import SumsLoss

_Loss = typing.TypeVar("_Loss", bound=type)


def _registered(loss: _Loss) -> _Loss:
    """Gives a loss its place among those that Keras loads, and the text of the loss it is."""
    loss.__doc__ = loss.__bases__[0].__doc__
    return typing.cast(_Loss, keras.saving.register_keras_serializable(package="dice_op")(loss))


class OverlapLoss(_family.OverlapLoss, SumsLoss):
    __doc__ = _family.OverlapLoss.__doc__


@_registered
class DiceLoss(_family.DiceLoss, OverlapLoss):
    pass


@_registered
class TverskyLoss(_family.TverskyLoss, OverlapLoss):
    pass


@_registered
class MatthewsLoss(_family.MatthewsLoss, OverlapLoss):
    pass


@_registered
class GeneralizedDiceLoss(_family.GeneralizedDiceLoss, SumsLoss):
    pass


@_registered
class GeneralizedWassersteinDiceLoss(_family.GeneralizedWassersteinDiceLoss, SumsLoss):
    pass


@_registered
class DiceCELoss(_family.DiceCELoss, DiceLoss):
    pass


@_registered
class DiceFocalLoss(_family.DiceFocalLoss, DiceCELoss):
    pass


@_registered
class GeneralizedDiceFocalLoss(_family.GeneralizedDiceFocalLoss, GeneralizedDiceLoss):
    pass


@_registered
class UnifiedFocalLoss(_family.UnifiedFocalLoss, SumsLoss):
    pass
