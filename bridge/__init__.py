"""What both twins share: the contract, the oracle, the cases, and the way between the frameworks.

Importing this package imports neither JAX nor PyTorch. `bridge.dlpack` moves arrays, `bridge.autograd` wraps functions.
"""
