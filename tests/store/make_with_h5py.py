"""Makes the smallest activation file docs/formats.md allows, as a user might. Arguments: the file."""

import sys

import h5py
import numpy as np

with h5py.File(sys.argv[1], "w") as file:
    file.attrs["contract"] = "lexico-activations 1"
    file.attrs["key_stage"] = np.bytes_("post_rope")  # a fixed-length text
    file.attrs["dtype"] = "float16"
    file.attrs.update(num_layers=1, kv_heads=2, head_dim=4, num_tokens=3, complete=True)
    vectors = np.arange(24, dtype=np.float16).reshape(6, 4)
    file["layers/00/keys"] = vectors
    file.create_dataset("layers/00/values", data=vectors, compression="gzip", chunks=(2, 4))
