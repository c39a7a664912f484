"""Which ways to train a model fit a GPU, in what order to try them, and what to change when none
does. Closed form: no torch.

The search relies on what the layout promises: a larger micro-batch or a longer sequence never needs
a lower peak, and no peak is below what is allocated between steps. It does not rely on what only
seems plausible:

* more GPUs need a lower peak: buckets, gathered parameters and logits do not shrink; from the
  second GPU on ZeRO-3 keeps small parameters whole (`stage3_param_persistence_threshold`), and
  padding grows with the number of GPUs;
* ZeRO-3 needs less than ZeRO-2: it keeps its reduce bucket between steps, and models below
  `stage3_max_live_parameters` stay gathered;
* checkpointing lowers the peak: that of a model of one layer, or one that the step or init sets,
  stays where it is.
"""
