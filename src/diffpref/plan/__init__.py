"""What a run will take, before it starts: parameters, memory, disk, work and time, found without weights or a GPU.

The network and its encoders are built on torch's meta device, whose tensors have shapes and no content, and a training
step runs on them: `rules.py` gives its tensors the dtypes that autocast gives, `ledger.py` adds up what is allocated,
torch's own counter the FLOPs.
"""
