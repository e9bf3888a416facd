"""Where nnU-Net finds the trainers of nnunet-ssl: the folder of this file is what nnUNet_extTrainer names."""

# All that nnU-Net asks is whether this module has the name; which there are, the table in methods/__init__.py says.
from nnunet_ssl.methods import *  # noqa: F403
