"""FedAvg in Flower, with a client that changes every value a little instead of training.

Runs in Flower's own environment, so it must not import anything of ours. ``notes`` is a file that
gets a line with the wall clock whenever a round begins, and one when the last one has ended.
"""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


class Noted(FedAvg):
    """FedAvg that notes when each of its rounds begins."""

    def __init__(self, notes, clients):
        everybody = {"min_train_nodes": clients, "min_available_nodes": clients}
        super().__init__(fraction_evaluate=0.0, **everybody)
        self.notes = Path(notes)

    def note(self):
        with self.notes.open("a") as file:
            file.write(f"{time.time()}\n")

    def configure_train(self, *arguments, **options):
        self.note()
        return super().configure_train(*arguments, **options)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    rng = np.random.default_rng(0)
    width = config["width"]
    arrays = []
    for _ in range(config["layers"]):
        arrays.append(rng.standard_normal((width, width), dtype=np.float32))
        arrays.append(rng.standard_normal(width, dtype=np.float32))
    while len(list(grid.get_node_ids())) < config["clients"]:
        time.sleep(0.1)
    strategy = Noted(config["notes"], config["clients"])
    strategy.start(grid, initial_arrays=ArrayRecord(arrays), num_rounds=config["rounds"])
    strategy.note()


@client.train()
def train(message: Message, context: Context) -> Message:
    step = 1e-3 * (1 + int(context.node_config["partition-id"]))
    arrays = [array + np.float32(step) for array in message.content["arrays"].to_numpy_ndarrays()]
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)
