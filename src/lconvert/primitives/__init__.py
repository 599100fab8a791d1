"""What compression methods are made of: one small module per idea, each with its paper, formula, shapes and defaults.

    job          what all passes of one run share: text, device, memory, where finished layers are kept
    placement    which weights get which grid
    text         calibration windows
    sequential   one layer after another, fed by the compressed ones before it (skeleton, slots, listening, activations, budget, finished)
    statistics   what is summed over a matrix's inputs
    importance   mean squares of inputs in the uncompressed model
    sites        where factors can move between what makes an activation and what reads it
    folding      factors and rotations multiplied into weights
    hadamard     rotations that spread outliers

Methods (lconvert.passes) are compositions of these; nothing here knows a file format or a target.
"""
