"""Data sets onto disk, as ArrayRecord files; `prepare` has the functions that others call.

`trees` reads folders and archives of images, `builders` are the TFDS builders of our own sets,
`downloads` checks that TFDS can download, and `tfrecord` converts what TFDS has prepared.
"""

from alexnet_jax.data.prepare.prepare import Prepared as Prepared
from alexnet_jax.data.prepare.prepare import prepare_path as prepare_path
