"""The interfaces of DeepGEMM, FlashMLA, DeepEP and EPLB, computed by deepkern."""
