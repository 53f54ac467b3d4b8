"""TEMPORARY torch version until the kernels come."""
from __future__ import annotations
import dataclasses
import torch
EPS = 1e-12
@dataclasses.dataclass(frozen=True)
class FormedSpec:
    weight_OI: torch.Tensor
    params: dict
    grads: dict
    kind: object
    scale: float
    left_OR: torch.Tensor | None = None
    right_IR: torch.Tensor | None = None
@dataclasses.dataclass(frozen=True)
class FormedLayer:
    weight_OI: torch.Tensor
    left_OR: torch.Tensor
    right_RI: torch.Tensor
class FormedWeights:
    def __init__(self, specs, product, impl="auto"):
        self.specs, self.layers, self.kept = list(specs), [], [None] * len(specs)
        for s in self.specs:
            O, I = s.weight_OI.shape
            core = s.params["M_xs" if s.kind.xs else "lora_A"]
            R = core.shape[0]
            new = lambda *shape: torch.empty(shape, dtype=product, device=s.weight_OI.device)
            self.layers.append(FormedLayer(new(O, I), new(O, R), new(R, I)))
    @torch.no_grad()
    def form(self):
        for i, (s, l) in enumerate(zip(self.specs, self.layers)):
            W0 = s.weight_OI.float()
            if s.kind.xs: L, F = s.left_OR.float(), s.right_IR.float().t(); R = s.params["M_xs"] @ F
            else: L, R = s.params["lora_B"], s.params["lora_A"]; F = R
            V = W0 + s.scale * L @ R
            g, h = torch.ones(V.shape[0]), torch.ones(V.shape[1])
            n = c = None
            if s.kind.rows: n = V.norm(dim=1); g = s.params[s.kind.row_magnitude] / (n + EPS)
            if s.kind.cols: c = (g[:, None] * V).norm(dim=0); h = s.params[s.kind.col_magnitude] / (c + EPS)
            l.weight_OI.copy_(g[:, None] * V * h); l.left_OR.copy_(g[:, None] * L); l.right_RI.copy_(F * h)
            self.kept[i] = (L, R, F, V, g, h, n, c)
    @torch.no_grad()
    def finish(self):
        for s, (L, R, F, V, g, h, n, c) in zip(self.specs, self.kept):
            G = s.grads; k = s.kind; sc = s.scale
            dL = dR = dM = None
            if k.xs: dM = sc * G["M_xs"]
            else: dL, dR = sc * g[:, None] * G["lora_B"], sc * G["lora_A"] * h
            t = 0
            if k.cols:
                dh = G[k.col_magnitude] / h; q = -h * dh / ((c + EPS) * c)
                E = (g.square()[:, None] * L).t() @ V
                if k.xs: dM += sc * (E * q) @ s.right_IR
                else: dR += sc * E * q; dL += sc * g.square()[:, None] * (V @ (R * q).t())
                t = V.square() @ q
                G[k.col_magnitude].copy_(dh / (c + EPS))
            if k.rows:
                dg = G[k.row_magnitude] / g + (g * t if k.cols else 0)
                kk = -g * dg / ((n + EPS) * n)
                if k.xs: dM += sc * (kk[:, None] * L).t() @ (V @ s.right_IR)
                else: dL += sc * kk[:, None] * (V @ R.t()); dR += sc * (kk[:, None] * L).t() @ V
                G[k.row_magnitude].copy_(dg / (n + EPS))
            if k.xs: G["M_xs"].copy_(dM)
            else: G["lora_A"].copy_(dR); G["lora_B"].copy_(dL)
