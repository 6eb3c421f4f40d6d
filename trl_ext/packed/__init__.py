"""
A training step that computes each prompt once and no padding: below TRL's fused LM head, with the same gradients.

    packing    padded rows → one packed row [prefix | suffix 1 | suffix 2 | …] per group
    attention  over that row, as an attention function of transformers; `varlen` is its form on CUDA
    head       log-probs and KL from an LM head that is not trained, with two products per token
    forward    puts these three before TRL's forward of a model
    verdict    which models and batches take TRL's forward after all, and why
    order      rows of one prompt into one micro-batch
"""
