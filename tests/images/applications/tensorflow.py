import sys
import time

import tensorflow

product = tensorflow.linalg.matmul(tensorflow.eye(4), tensorflow.ones((4, 4)))
assert float(tensorflow.reduce_sum(product)) == 16
print("ready", flush=True)
if len(sys.argv) > 1:
    time.sleep(float(sys.argv[1]))
