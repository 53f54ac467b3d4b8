"""Keep float32 products exact, whatever the environment tells the libraries."""

import os
import sys

# Images by NVIDIA and AWS, among others, set these variables. Libraries read them when they are loaded.
EXACT_PRODUCTS = {"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}


def keep_products_exact() -> None:
    """Overrule, with a warning, an environment that rounds the factors of products. Call before importing torch."""
    for name, exact in EXACT_PRODUCTS.items():
        # oneDNN also reads the variable under an older name.
        value = os.environ.get(name) or os.environ.get(name.replace("ONEDNN_", "DNNL_")) or exact
        if value.upper() != exact and os.environ.get("RANK", "0") == "0":
            print(f"sa3dist: {name}={value} would round float32 products; {exact} is used", file=sys.stderr)
        os.environ[name] = exact
