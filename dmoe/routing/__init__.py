"""hidden -> who goes where: one file per family of routers."""
