"""An outcome's way into the records of the host. No jax."""


def commit(scheduler, outputs, planned, outcome, version, results, events=None):
    """Take in a StepOutcome: DecodeResults of ended requests join `results`.

    `version` is that of the weights the step ran with; `events` is a list to fill with
    StreamEvents, or None if nobody wants them.
    """
    with_text = events is not None
    committed, emissions = outputs.judge(planned, outcome, version, with_text=with_text)
    written = [(e.output.request, e.tokens, bool(e.finish_reason)) for e in emissions]
    scheduler.commit(planned, committed, written)
    outputs.hand_out(emissions, results, events)
