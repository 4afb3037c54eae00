"""Not offered: importing it says what to use instead."""

from dmoe.compat._not_offered import not_offered

raise not_offered("layers.weight_parallel")
