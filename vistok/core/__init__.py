"""Pure tensor functions that systems are recipes of: no state, no I/O, batch first, no Python loop over the batch.

``score`` (how much a token matters), ``outlier`` (how many of them stand out), ``allocate`` (how many tokens go where),
``select`` (which ones stay; ``greedy`` and ``cluster`` hold its longer algorithms), ``merge`` (where the others end),
``position`` (order and position ids of what stays), ``soft`` and ``supertoken`` (tokens that are weighted means of
others), ``scan`` (state space models), ``attention`` (the few rows and means of a map that scores need),
``flops`` (what a transformer of given shapes costs). For tokenizers: ``codes`` and ``quantize`` (vectors to ids and
back), ``drop`` (nested dropout), ``visibility`` (masks), ``flow`` (rectified flow), ``masked`` (masked token models),
``losses`` and ``fidelity`` (PSNR, SSIM, Frechet distance).

Conventions. B pictures, N tokens, K kept, D features. ``mask`` (B, N) is bool, False at a padded token, which is never
selected. Ties of computed values break by the lower index, so that a CPU and a GPU agree. Features in half precision
are computed on in float32. Wrong arguments raise ValueError naming the argument, what it got and what would be right.
"""
