"""vidit trains video diffusion transformers, from one laptop core to a cluster.

Tensor suffixes, one key for the whole project (`x_BCTHW` is a latent batch):

    B batch (clips)      C latent channels    T H W latent frames, height, width
    S video tokens       L text tokens        D model width
    N attention heads    K head dim           F hidden (MLP) width
    E text feature width   R rows of the conditioning

"frame" alone is a pixel frame, "latent frame" one of the T; "clip" is one training example, "sample" a
generated video, "step" an optimizer step; "axis" belongs to a device mesh, "dim" to a tensor.
"""

__version__ = "0.1.0"
