"""How a MuJoCo dataset with every quality is made: one online SAC run, every transition logged.

  pip install "gymnasium[mujoco]" "stable-baselines3"
  python benchmarks/collect_sac.py --env-id Hopper-v5 --steps 200000 --dataset-id hopper/replay-v0

Writes <dataset-id>, every transition of the run in order, to Minari's folder; reference scores are
the returns of random actions and of the best of the policies that were evaluated along the way.
"""

from dataclasses import dataclass

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer


@dataclass
class Args:
    env_id: str = "Hopper-v5"  # a Gymnasium environment with Box actions
    dataset_id: str = "hopper/replay-v0"  # of the dataset that is written
    steps: int = 200_000  # of SAC, each a transition of the dataset
    eval_every: int = 10_000  # steps between evaluations of 10 episodes
    seed: int = 0  # of SAC and of the environment


class Recorder(gym.Wrapper):
    """Keeps every episode as Minari's buffer; the last one may be cut."""

    def __init__(self, env):
        super().__init__(env)
        self.episodes, self.obs = [], []

    def reset(self, **kwargs):
        self.close_episode()
        obs, info = self.env.reset(**kwargs)
        self.obs, self.rows = [np.asarray(obs, np.float32)], []
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.obs.append(np.asarray(obs, np.float32))
        self.rows.append((np.asarray(action, np.float32), reward, terminated, truncated))
        return obs, reward, terminated, truncated, info

    def close_episode(self):
        if len(self.obs) > 1:
            action, reward, terminated, truncated = map(np.array, zip(*self.rows, strict=True))
            truncated[-1] |= not terminated[-1]
            columns = np.array(self.obs), action, reward, terminated, truncated, {}
            self.episodes.append(EpisodeBuffer(None, None, None, *columns))
            self.obs = []


def mean_return(env_id, act, episodes=10):
    env, returns = gym.make(env_id), np.zeros(episodes)
    for i in range(episodes):
        obs, ended = env.reset(seed=10_000 + i)[0], False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            returns[i] += reward
            ended = terminated or truncated
    return float(returns.mean())


def main(args: Args):
    from stable_baselines3 import SAC

    env, space = Recorder(gym.make(args.env_id)), gym.make(args.env_id).action_space
    space.seed(args.seed)
    model, best = SAC("MlpPolicy", env, seed=args.seed), -np.inf
    for step in range(0, args.steps, args.eval_every):
        model.learn(args.eval_every, reset_num_timesteps=step == 0)
        now = mean_return(args.env_id, lambda obs: model.predict(obs, deterministic=True)[0])
        best = max(best, now)
        print(f"{step + args.eval_every} steps: return {now:.1f}")
    env.close_episode()
    minari.create_dataset_from_buffers(
        args.dataset_id,
        env.episodes,
        env=args.env_id,
        ref_min_score=mean_return(args.env_id, lambda obs: space.sample()),
        ref_max_score=best,
        algorithm_name="stable-baselines3 SAC",
        description=f"every transition of {args.steps} steps of SAC on {args.env_id}",
        author="benchmarks/collect_sac.py",
        author_email="none",
        code_permalink="none",
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
