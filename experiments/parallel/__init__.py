"""Several devices and several processes.

`mapping` maps a function over devices, `placement` puts arrays on them.
`processes` starts the processes of a run and lets them agree; `watch` ends all
of them when one fails.
"""
