"""The experiments of the super weight paper, one module each, on whatever model is at hand.

Every experiment has two functions. `changes(subject)` lists the changed models that it needs measured;
`conclude(subject, measured, …)` turns the measurements into a `Section`: what the paper found, what this model shows,
figures, tables. The study (`swquant.study.pipeline`) measures each distinct change once, whoever asked for it.
"""
