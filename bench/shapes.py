"""The shapes that are measured; each says which regime it covers. N rows, C classes, D inputs, V outputs."""

# A call on next to nothing: all of the time is the way through Python, dispatcher and autograd.
TINY = (4, 8)

# (N, C)
CROSS_ENTROPY = [
    (256, 10),  # the notes' softmax regression: 10 KB, per-call overhead decides, a row is shorter than a vector
    (257, 1003),  # ragged: neither a multiple of a vector nor of a block, 1 MB, within L2
    (4096, 1000),  # an ImageNet head: 16 MB, within most last-level caches; a row fits L1
    (4096, 32000),  # a language model's vocabulary: 524 MB, beyond caches, fresh pages decide; a row fits L2
]
CROSS_ENTROPY_FULL = [(256, 10), (4096, 1000), (4096, 32000)]  # forward, backward and both, each dtype
CROSS_ENTROPY_OPTIONS = (4096, 1000)  # label smoothing, probabilities, class weights with ignored rows
CROSS_ENTROPY_KDIM = (8, 21, 256, 256)  # segmentation: 44 MB, the class stride is 65536 elements

# (N, C)
SOFTMAX = [
    (256, 10),  # overhead
    (4096, 1000),  # cache-resident rows
    (4096, 32000),  # beyond caches
]
SOFTMAX_INNER = (8, 21, 256, 256)  # along dim 1: strided classes, no transposing copy

# (N, D, V)
LINEAR = [
    (256, 64, 10),  # the 8x8 digits: overhead and skinny outputs
    (256, 784, 10),  # Fashion-MNIST: skinny outputs, 4 MFLOP
    (250, 783, 11),  # the same, ragged in all three sizes
    (1, 1024, 1024),  # one row: the weight is read once, no packing can pay
    (8, 1024, 4096),  # few rows: 16 MB of weight at memory speed
    (1024, 1024, 1024),  # square, compute-bound, operands within the last-level cache
    (2048, 1024, 4096),  # a transformer's wide layer: compute-bound, 17 GFLOP
]
LINEAR_HALF = [(256, 784, 10), (1024, 1024, 1024)]  # bfloat16 and float16: skinny, and large enough for the peak
LINEAR_ACTIVATION = (1024, 1024, 1024)  # an activation in the epilogue against a second pass over the output

# The grid of the linear layer: rows of each layer (D, V). Few rows read the weight once, many are compute-bound; a wide
# layer's output and a deep layer's weight exceed L2, a vocabulary's weight the last-level cache too.
GRID_ROWS = (64, 256, 1024, 2048)
GRID_LAYERS = ((784, 256), (768, 3072), (1024, 4096), (4096, 1024), (1024, 32000))
GRID_HALF_ROWS = (64, 256)  # PyTorch takes minutes for more where the CPU has no instructions for half types
GRID_HALF_BACKWARD = 256 * 1024 * 4096  # the largest NDV of a backward in a half type

# (N, D, V)
LINEAR_CROSS_ENTROPY_SMALL = [
    (256, 64, 1000),  # 1 MB of logits, within L2: what is saved is passes and calls
    (128, 128, 8192),  # few rows: every chunk would read the weight again, so there is one
]
LINEAR_CROSS_ENTROPY = [
    *LINEAR_CROSS_ENTROPY_SMALL,
    (1024, 1024, 32000),  # a language model's head, 131 MB of weight: compute-bound
    (1024, 256, 128256),  # a vocabulary of today, 525 MB of logits
    (4096, 256, 32000),  # many rows, 524 MB of logits
]
LINEAR_CROSS_ENTROPY_HALF = (1024, 512, 8192)  # bfloat16
LINEAR_CROSS_ENTROPY_OPTIONS = (1024, 1024, 32000)  # ignored rows, a weight without gradient, a peaked softmax
# The curves of time and memory over V, with N rows and D inputs: logits of 134 MB to 4.3 GB.
VOCABULARIES, VOCABULARIES_ROWS = (8192, 32000, 128256, 262144), (4096, 64)

# (N, D, V, n): a weight of n Kronecker products
PHM_LINEAR = [
    (2048, 1024, 4096, 4),  # compute-bound: the dense layer's arithmetic, after a pass that mixes the rows
    (1, 1024, 4096, 4),  # the weights are read once: a quarter of the dense layer's 16 MB
    (8, 1024, 4096, 4),  # 32 mixed rows
]
PHM_LINEAR_HALF = (256, 1024, 1024, 4)  # bfloat16

# (N, D, V): a softmax regression's layer and loss in one step
TRAINING = [(256, 784, 10), (256, 64, 10)]
# (N, D, V): the notes' linear regression, batch 10
REGRESSION = (10, 2, 1)
# (N, D, V): a linear regression's layer and loss in one, all data at once
LINEAR_MSE = [
    (1_000_000, 8, 1),  # rows shorter than a vector, 32 MB: read once
    (200_000, 100, 4),  # longer ones, a few outputs, 80 MB
    REGRESSION,  # overhead
]
LINEAR_NLL = (4096, 512, 1000)  # many outputs, 16 MB of predictions: compute-bound
