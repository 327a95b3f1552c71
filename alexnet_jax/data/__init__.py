"""The images of a run, from the name of a data set to batches on the devices.

`load` opens a run's data. `source` reads a set that `prepare` has prepared, `decode` decodes its
images, and `cache` keeps what was computed from them. `in_memory` and `streaming` feed the steps in
the order that `sampling` draws; `augment` and `tta` transform batches on the device.
"""
