import sys
import time

import numpy
import pandas

model = numpy.fromfile("/app/model.bin", dtype=numpy.uint16)
frame = pandas.DataFrame({"key": numpy.arange(len(model)) % 7, "value": model})
assert len(frame.groupby("key")["value"].mean()) == 7
print("ready", flush=True)
if len(sys.argv) > 1:
    time.sleep(float(sys.argv[1]))
