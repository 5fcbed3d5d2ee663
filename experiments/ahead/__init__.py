"""Compiles the programs of a config for chips that are not there.

`targets` names the chips, `programs` compiles for them, `analysis` reads the
compiled programs and `roofline` estimates their time.
"""
