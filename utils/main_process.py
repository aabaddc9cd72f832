"""What only one of the processes of a training does, such as writing files: its result, or its error, is everyone's."""

from accelerate.utils import broadcast_object_list

from utils.errors import UserError


def on_main(accelerator, function, *args):
    """Return on every process what `function(*args)` returns on the main one; a user's mistake found there ends all of them."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*args)
        except UserError as error:
            outcome[1] = str(error)
    result, error = broadcast_object_list(outcome)
    if error:
        raise UserError(error) if accelerator.is_main_process else SystemExit(2)
    return result
