"""The tiny model behind the adapter recordings, a base without text conditioning, and helpers to move its adapter."""

import json

import torch
from safetensors.torch import load_file
from torch import nn

from sa3dist.adapters import adapter_parameters
from sa3dist.model.checkpoint import tensors_digest
from sa3dist.model.conditioners import NumberConditioner
from sa3dist.model.config import AttentionKwargs, DiTConfig, FeedForwardKwargs, NormKwargs, NumberConfig
from sa3dist.model.dit import DiT
from tests.helpers.golden import golden


def adapter_digest(base) -> str:
    """Equal exactly for equal names, shapes and float32 values of the adapter's tensors."""
    return tensors_digest(adapter_parameters(base))


class RecordedBase(nn.Module):
    """The real transformer and number conditioner, filled from ``base_tiny.safetensors``."""

    def __init__(self):
        super().__init__()
        config = json.loads(golden("adapters/golden.json").read_text())["checkpoints"]["tiny_model_config"]
        for key in ("conditioner", "note", "global_cond_type", "timestep_features_type"):
            del config[key]
        config["attn_kwargs"] = AttentionKwargs(**config["attn_kwargs"])
        config["norm_kwargs"] = NormKwargs(**config["norm_kwargs"])
        config["ff_kwargs"] = FeedForwardKwargs(**config["ff_kwargs"])
        self.model = nn.Module()
        self.model.model = DiT(DiTConfig(**config))
        self.conditioner = nn.Module()
        number = NumberConditioner(NumberConfig(0.0, 384.0), config["cond_token_dim"])
        self.conditioner.conditioners = nn.ModuleDict({"seconds_total": number})
        recorded = load_file(golden("adapters/base_tiny.safetensors"))
        # The file is rounded to bfloat16; the recorded forward used the exact frequencies.
        recorded["model.model.transformer.rotary_pos_emb.inv_freq"] = (
            self.model.model.transformer.rotary_pos_emb.inv_freq
        )
        self.recorded = {key: value.float() for key, value in recorded.items()}
        self.load_state_dict(self.recorded)

    @property
    def adapter_roots(self):
        return self.model, self.conditioner

    @property
    def dit(self):
        return self.model.model

    def fp32_weight(self, name, device="cpu"):
        root = "conditioner" if name.startswith("conditioners.") else "model"
        return self.recorded[f"{root}.{name}.weight"]

    def weights_digest(self):
        return "recorded"

    def forward(self, x_BCT, t_B, inpaint_mask_B1T):
        embed = self.conditioner.conditioners["seconds_total"](torch.tensor([2.0, 30.0]), torch.float32)
        local = torch.cat([inpaint_mask_B1T, x_BCT * inpaint_mask_B1T], dim=1)
        return self.model.model(x_BCT, t_B, embed, embed[:, 0], local)


def forward_inputs(base, dtype=torch.float32):
    """Some input of the recorded forward's kind."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, 24, generator=draw)
    return x.to(dtype), torch.tensor([0.3, 0.8]), (torch.rand(2, 1, 24, generator=draw) < 0.4).to(dtype)


def move(base, seed=1, amount=0.05):
    """Change every trained value, so that no zero or one of the initial state hides a wrong term."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter += amount * torch.randn(parameter.shape, generator=draw)
