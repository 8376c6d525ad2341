# SPDX-License-Identifier: Apache-2.0
"""Files in and out; import the module you need, nothing is loaded here.

`hf` Hugging Face checkpoints, `hf_config` their `config.json`, `safetensors` and `shards` the
tensor files underneath, `checkpoint` training checkpoints, `tokenizer` tokenizers.
"""
