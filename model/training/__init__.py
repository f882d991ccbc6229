"""Training by the DeepSeek-V3 recipe; `model/train.py` is the command."""
