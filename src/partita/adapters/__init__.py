"""Adapters: plans from and to what other libraries use; each module needs its library, none is imported here.

``partita.adapters.accelerate``: device maps. ``partita.adapters.pipelining``: split points and stages of
torch.distributed.pipelining. ``partita.adapters.trainer``: transformers.Trainer. Lightning needs none: in one process a
ParallelModule inside a LightningModule trains as any module does.
"""
