"""What only one of the processes of a training does, such as writing files: its result, or its error, is everyone's."""

from accelerate.utils import broadcast_object_list


def on_main(accelerator, function, *args):
    """Return on every process what `function(*args)` returns on the main one; an error there ends all of them."""
    outcome, failure = [None, None], None
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*args)
        except Exception as error:  # the others must not wait for what will not come
            outcome[1], failure = str(error) or type(error).__name__, error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise failure if accelerator.is_main_process else SystemExit(2)
    return result
