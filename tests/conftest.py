"""One thread, since tiny tensors gain nothing from more; property tests without a clock and with fixed draws."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")
