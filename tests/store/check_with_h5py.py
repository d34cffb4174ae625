"""Reads the file of activations_test.cpp as docs/formats.md tells users to. Arguments: the file."""

import sys

import h5py
import numpy as np

with h5py.File(sys.argv[1]) as file:
    attributes = dict(file.attrs)
    assert attributes["contract"] == "lexico-activations 1", attributes
    assert attributes["model"] == "toy/model"
    assert list(attributes["corpora"]) == ["wiki", "códe"]
    assert list(attributes["corpus_documents"]) == [3, 4]
    assert attributes["key_stage"] == "post_rope" and attributes["dtype"] == "float16"
    assert (attributes["num_layers"], attributes["kv_heads"], attributes["head_dim"]) == (2, 3, 20)
    assert attributes["num_tokens"] == 700 and attributes["num_vectors"] == 2100
    assert attributes["seed"] == 0xFEDCBA9876543210 and attributes["complete"] == 1
    assert sorted(file) == ["layers", "tokens"] and sorted(file["layers"]) == ["00", "01"]
    token, head, component = np.indices((700, 3, 20))
    for layer in range(2):
        for kind, shift in (("keys", 0.0), ("values", 0.5)):
            data = file[f"layers/{layer:02d}/{kind}"]
            assert data.dtype == np.float16 and data.chunks == (2048, 20) and data.shape == (2100, 20)
            want = np.sin(token * 131 + head * 17 + component + layer * 1009 + shift)
            np.testing.assert_allclose(data[:].reshape(700, 3, 20), want, atol=1 / 2048)
        moment = file[f"layers/{layer:02d}/query_second_moment"]
        assert moment.dtype == np.float32 and moment.shape == (3, 20, 20) and (moment[:] == 1.5).all()
    for name in ("id", "position", "document"):
        assert file[f"tokens/{name}"].dtype == np.int32 and file[f"tokens/{name}"].shape == (700,)
    assert (file["tokens/id"][:] == 1000 + np.arange(700)).all()
    assert (file["tokens/position"][:] == np.arange(700) % 10).all()
