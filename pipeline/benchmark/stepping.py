"""The steps of a run, one whenever it is asked for: the training loop without what lies between its steps."""

from pipeline.data.loading.prefetch import prefetched
from pipeline.progress import Progress
from pipeline.run import FetchedStep, Run
from pipeline.train import advance, fetch_step, train_step


class TrainingSteps:
    """A run's steps from the first one on; a call takes the next. As in training, the following step is fetched before."""

    def __init__(self, run: Run) -> None:
        self.run, self.progress = run, Progress()
        self.batches = prefetched(run.stream.iterate(0), run.device, depth=2)
        self.following = self.fetch(0, 0)

    def fetch(self, step: int, first_sample: int) -> FetchedStep:
        """Fetch and count the step of this number, whose first row has that one."""
        return fetch_step(self.run, self.batches, step, first_sample)

    def __call__(self) -> None:
        progress, settings, fetched = self.progress, self.run.settings, self.following
        self.following = self.fetch(progress.step + 1, progress.samples + settings.data.global_batch)
        advance(progress, train_step(self.run, fetched, progress), settings)
