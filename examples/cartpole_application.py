"""An application with its own loop: it owns the environment and learns online from the services that run.

Start them with `relayrl up`, then: python examples/cartpole_application.py relayrl-data/client_config.json
"""

import sys

import gymnasium

from relayrl_client import AgentBuilder

EPISODES = int(sys.argv[2]) if len(sys.argv) > 2 else 300

environment = gymnasium.make("CartPole-v1")
builder = AgentBuilder(
    config_path=sys.argv[1],  # where the services are
    environment=environment,
    actor_count=1,
    run_name="cartpole-application",
    algorithm="PPO",
    hyperparameters={"rollout_steps": 256, "minibatch": 64, "train_pi_iters": 10, "train_vf_iters": 10},
)
with builder.build() as agent:
    (actor,) = agent.get_actor_ids()
    for episode in range(EPISODES):
        observation, _ = environment.reset()
        total, reward, terminated, truncated = 0.0, 0.0, False, False
        while not (terminated or truncated):
            action = agent.request_action(actor, observation, reward=reward).action
            observation, received, terminated, truncated, _ = environment.step(action)
            reward = float(received)
            total += reward
        agent.end_episode(
            actor, reward, terminated=terminated, truncated=truncated, final_observation=observation
        )
        policy_version = agent.get_model_version()[0][1]
        print(f"episode {episode + 1}: return {total:.0f}, policy version {policy_version}")
environment.close()
