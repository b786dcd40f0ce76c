"""The command line. Each module of commands has an `add` function that defines their options.

torch is imported inside functions, so that --help and wrong options respond at once.
"""
