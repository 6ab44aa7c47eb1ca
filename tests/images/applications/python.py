import sys
import time

import numpy
import pandas

frame = pandas.DataFrame({"key": numpy.arange(1000) % 7, "value": numpy.linspace(0, 1, 1000)})
assert abs(frame.groupby("key")["value"].mean().mean() - 0.5) < 0.01
print("ready", flush=True)
if len(sys.argv) > 1:
    time.sleep(float(sys.argv[1]))
