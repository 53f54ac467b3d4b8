"""Products of float32 keep all of its bits, whatever the environment asks of the libraries."""

import os
import sys

# Images set them, of NVIDIA and AWS among others. Libraries read them as they are loaded.
EXACT_PRODUCTS = {"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}


def keep_products_exact() -> None:
    """Before torch is imported: an environment that rounds the factors of float32 products is overruled, and named."""
    for name, exact in EXACT_PRODUCTS.items():
        # oneDNN knows its variable under an older name, too.
        value = os.environ.get(name) or os.environ.get(name.replace("ONEDNN_", "DNNL_")) or exact
        if value.upper() != exact and os.environ.get("RANK", "0") == "0":
            print(f"sa3dist: {name}={value} would round float32 products; {exact} is used", file=sys.stderr)
        os.environ[name] = exact
