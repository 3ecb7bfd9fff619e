"""The built-in data set: five rendered categories in the spirit of MVTec LOCO AD, with true component label maps.

`kit` draws and photographs, one module per category states its rules and paints it, `writer` lays the files out.
"""

from csad.synthetic import breakfast_box, juice_bottle, pushpins, screw_bag, splicing_connectors

CATEGORIES = {
    module.CATEGORY.name: module.CATEGORY
    for module in (breakfast_box, juice_bottle, pushpins, screw_bag, splicing_connectors)
}
