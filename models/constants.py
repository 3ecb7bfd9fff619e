"""Numbers that networks, pictures and maps share; this module needs nothing else."""

SIZE = 256  # side in pixels that every network of the paper sees; file names carry the number
MAP_SIZE = 64  # side of every anomaly map
QUARTERS = 4  # of an image, whose areas are counted apart
MAP_QUANTILES = (0.9, 0.995)  # of the validation maps, by which maps are scaled
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
OUTSIDE = 127  # grey of what lies outside the region of interest
