"""Each loss of the family, with options that go through every formula."""

from helpers.kernel_inputs import distances_of

# What it is: the name of the loss, and its arguments.
EACH = {
    "Dice": ("DiceLoss", {}),
    "Dice, weights": ("DiceLoss", dict(class_weight=[1, 2, 3, 4], absent="one")),
    "Dice, batch": ("DiceLoss", dict(batch=True, include_background=False, absent="skip")),
    "Dice, micro": ("DiceLoss", dict(activation="sigmoid", average="micro", jaccard=True)),
    "Dice, log": ("DiceLoss", dict(transform="log", average="weighted")),
    "Dice, log-cosh": ("DiceLoss", dict(transform="log_cosh", absent="one")),
    "Tversky": ("TverskyLoss", dict(alpha=0.3, beta=0.7, gamma=0.8)),
    "Matthews": ("MatthewsLoss", {}),
    "generalized": ("GeneralizedDiceLoss", dict(weight_type="simple", infinite_weight="zero")),
    "generalized, squares": ("GeneralizedDiceLoss", {}),
    "Wasserstein": ("GeneralizedWassersteinDiceLoss", dict(dist_matrix=distances_of(4))),
    "Wasserstein, GDL": (
        "GeneralizedWassersteinDiceLoss", dict(dist_matrix=distances_of(4), weighting_mode="GDL"),
    ),
    "Dice + CE": ("DiceCELoss", dict(ce_class_weight=[1, 2, 3, 4], label_smoothing=0.1)),
    "Dice + binary CE": ("DiceCELoss", dict(activation="sigmoid", pos_weight=[1, 2, 3, 4])),
    "Dice + focal": ("DiceFocalLoss", dict(batch=True)),
    "generalized + focal": ("GeneralizedDiceFocalLoss", dict(lambda_ce=0.5)),
    "unified focal": ("UnifiedFocalLoss", dict(gamma=0.3)),
    "label sets": ("DiceCELoss", dict(label_sets={3: (0, 3)}, absent="skip")),
}  # fmt: skip
