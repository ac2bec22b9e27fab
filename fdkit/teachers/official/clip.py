from fdkit.teachers.official._layout import Layout

LAYOUTS: tuple[Layout, ...] = ()
