"""The 128 frequencies of the exponential Fourier features, as recorded bits that are the same on every machine.

Computing them would not be: float32 exp and linspace differ between processors in the last bit. Angles reach 6e4 rad,
where one bit of a frequency changes a velocity by 6e-5.
"""

import functools
import struct

import torch

# Features of one number: a cosine and a sine per frequency. All models have this many.
FEATURES = 256

# 0.5 * 20000 ** ramp for 128 steps from 0 to 1, as big-endian float32 bits, recorded from the reference with the
# golden tensors (``expo.freqs`` in tests/golden/*/golden.safetensors). Five are not the float32 nearest to the formula.
_RECORDED = """
    3f000000 3f0a6187 3f159a95 3f21bca5 3f2eda9d 3f3d08eb 3f4c5da5 3f5cf0ac 3f6edbd1 3f811d7d 3f8b962c 3f96e842
    3fa32562 3fb0609a 3fbeae8a 3fce2577 3fdedd75 3ff0f08f 40023d77 400ccd82 401838d7 40249143 4031ea00 404057d7
    404ff140 4060ce88 407309f1 40835ff6 408e078c 40998c5b 40a60051 40b376d3 40c204d6 40d1c10c 40e2c3ef 40f52806
    410484f7 410f4455 411ae2d5 4127728f 41350718 4143b592 415394e0 4164bdb8 41774ad4 4185ac8c 419083e1 419c3c49
    41a8e80a 41b69ada 41c56a15 41d56cc7 41e6bbe1 41f97261 4206d6b2 4211c633 421d98bf 422a60c5 42383223 42472264
    425748d1 4268be87 427b9ec4 42880370 42930b55 429ef83f 42abdcc7 42b9ccf6 42c8de88 42d928fb 42eac5a2 42fdcff0
    430932d0 4314534f 43205ad3 432d5c1d 433b6b63 434a9e91 435b0d54 436cd14a 43800308 438a64cc 43959e1d 43a1c079
    43aedebf 43bd0d61 43cc627b 43dcf5eb 43eee17a 44012090 440b997c 4416ebd5 44232942 443064cb 443eb30e 444e2a56
    445ee2be 4470f644 4482408c 448cd0d7 44983c71 44a49526 44b1ee31 44c05c5d 44cff62f 44e0d3dc 44f30fb3 45036316
    450e0aee 45199000 4526043f 45337b10 45420965 4551c5f6 4562c95c 45752de0 45848821 458f47bc 459ae680 45a77686
    45b50b5f 45c3ba31 45d399dc 45e4c318 45f750bf 4605afbd 46108752 461c4001
"""


@functools.cache
def expo_frequencies(device: torch.device) -> torch.Tensor:
    """Log-spaced frequencies from 0.5 to 10000, float32 of shape (128,)."""
    with torch.inference_mode(False):
        values = struct.unpack(f">{FEATURES // 2}f", bytes.fromhex(_RECORDED))
        return torch.tensor(values, dtype=torch.float32, device=device)
