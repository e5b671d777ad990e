"A GradScaler that is enabled where there is no GPU: what several tests here train with."
import torch

from fastrecipes.training.precision import Autocast


class Half(Autocast):
    "What a GPU does under to_fp16, as far as a CPU can: an enabled GradScaler, the forward pass in 32 bits."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16, enabled=False)
        self.learn.scaler = self.kept = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=2)
