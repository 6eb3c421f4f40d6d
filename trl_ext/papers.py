"""The papers that the package implements: what docstrings link, docs/papers.md lists and model cards cite."""

from .citations import Paper

# fmt: off
PAPERS: dict[str, Paper] = {
    "reinforce": Paper(
        "williams1992simple",
        "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
        "Ronald J. Williams",
        1992,
        source={"journal": "Machine Learning", "volume": "8", "pages": "229--256", "doi": "10.1007/BF00992696"},
    ),
    "deepseekmath": Paper(
        "shao2024deepseekmath",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li "
        "and Y. Wu and Daya Guo",
        2024, "2402.03300",
    ),
    "prorl": Paper(
        "liu2025prorl",
        "ProRL: Prolonged Reinforcement Learning Expands Reasoning Boundaries in Large Language Models",
        "Mingjie Liu and Shizhe Diao and Ximing Lu and Jian Hu and Xin Dong and Yejin Choi and Jan Kautz and Yi Dong",
        2025, "2505.24864",
    ),
    "rloo": Paper(
        "ahmadian2024back",
        "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
        "Arash Ahmadian and Chris Cremer and Matthias Gallé and Marzieh Fadaee and Julia Kreutzer and Olivier "
        "Pietquin and Ahmet Üstün and Sara Hooker",
        2024, "2402.14740",
    ),
    "pass_at_k": Paper(
        "chen2025passk",
        "Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning Models",
        "Zhipeng Chen and Xiaobo Qin and Youbin Wu and Yue Ling and Qinghao Ye and Wayne Xin Zhao and Guang Shi",
        2025, "2508.10751",
    ),
    "pkpo": Paper(
        "walder2025passk",
        "Pass@K Policy Optimization: Solving Harder Reinforcement Learning Problems",
        "Christian Walder and Deep Karkhanis",
        2025, "2505.15201",
    ),
    "best_of_group": Paper(
        "tang2025optimizing",
        "Optimizing Language Models for Inference Time Objectives using Reinforcement Learning",
        "Yunhao Tang and Kunhao Zheng and Gabriel Synnaeve and Rémi Munos",
        2025, "2503.19595",
    ),
    "gpg": Paper(
        "chu2025gpg",
        "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
        "Xiangxiang Chu and Hailang Huang and Xiao Zhang and Fei Wei and Yong Wang",
        2025, "2504.02546",
    ),
    "remax": Paper(
        "li2023remax",
        "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models",
        "Ziniu Li and Tian Xu and Yushun Zhang and Zhihang Lin and Yang Yu and Ruoyu Sun and Zhi-Quan Luo",
        2023, "2310.10505",
    ),
    "reinforce_plus_plus": Paper(
        "hu2025reinforce",
        "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
        "Jian Hu and Jason Klein Liu and Haotian Xu and Wei Shen",
        2025, "2501.03262",
    ),
    "dr_grpo": Paper(
        "liu2025understanding",
        "Understanding R1-Zero-Like Training: A Critical Perspective",
        "Zichen Liu and Changyu Chen and Wenjun Li and Penghui Qi and Tianyu Pang and Chao Du and Wee Sun Lee and "
        "Min Lin",
        2025, "2503.20783",
    ),
    "opo": Paper(
        "hao2025onpolicy",
        "On-Policy RL with Optimal Reward Baseline",
        "Yaru Hao and Li Dong and Xun Wu and Shaohan Huang and Zewen Chi and Furu Wei",
        2025, "2505.23585",
    ),
    "trpo": Paper(
        "schulman2015trust",
        "Trust Region Policy Optimization",
        "John Schulman and Sergey Levine and Philipp Moritz and Michael I. Jordan and Pieter Abbeel",
        2015, "1502.05477",
    ),
    "ppo": Paper(
        "schulman2017proximal",
        "Proximal Policy Optimization Algorithms",
        "John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov",
        2017, "1707.06347",
    ),
    "gae": Paper(
        "schulman2015highdimensional",
        "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "John Schulman and Philipp Moritz and Sergey Levine and Michael Jordan and Pieter Abbeel",
        2015, "1506.02438",
    ),
    "a2c": Paper(
        "huang2022a2c",
        "A2C is a special case of PPO",
        "Shengyi Huang and Anssi Kanervisto and Antonin Raffin and Weixun Wang and Santiago Ontañón and Rousslan "
        "Fernand Julien Dossa",
        2022, "2205.09123",
    ),
    "vc_ppo": Paper(
        "yuan2025whats",
        "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret",
        "Yufeng Yuan and Yu Yue and Ruofei Zhu and Tiantian Fan and Lin Yan",
        2025, "2503.01491",
    ),
    "process_feedback": Paper(
        "uesato2022solving",
        "Solving math word problems with process- and outcome-based feedback",
        "Jonathan Uesato and Nate Kushman and Ramana Kumar and Francis Song and Noah Siegel and Lisa Wang and Antonia "
        "Creswell and Geoffrey Irving and Irina Higgins",
        2022,
        "2211.14275",
    ),
    "lets_verify": Paper(
        "lightman2023lets",
        "Let's Verify Step by Step",
        "Hunter Lightman and Vineet Kosaraju and Yura Burda and Harri Edwards and Bowen Baker and others",
        2023,
        "2305.20050",
    ),
    "processbench": Paper(
        "zheng2024processbench",
        "ProcessBench: Identifying Process Errors in Mathematical Reasoning",
        "Chujie Zheng and Zhenru Zhang and Beichen Zhang and Runji Lin and Keming Lu and others",
        2024,
        "2412.06559",
    ),
    "math_shepherd": Paper(
        "wang2023mathshepherd",
        "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations",
        "Peiyi Wang and Lei Li and Zhihong Shao and R. X. Xu and Damai Dai and Yifei Li and Deli Chen and Y. Wu and "
        "Zhifang Sui",
        2023, "2312.08935",
    ),
    "omegaprm": Paper(
        "luo2024improve",
        "Improve Mathematical Reasoning in Language Models by Automated Process Supervision",
        "Liangchen Luo and Yinxiao Liu and Rosanne Liu and Samrat Phatale and Meiqi Guo and Harsh Lara and Yunxuan Li "
        "and Lei Shu and Yun Zhu and Lei Meng and Jiao Sun and Abhinav Rastogi",
        2024, "2406.06592",
    ),
    "qwen_math_prm": Paper(
        "zhang2025lessons",
        "The Lessons of Developing Process Reward Models in Mathematical Reasoning",
        "Zhenru Zhang and Chujie Zheng and Yangzhen Wu and Beichen Zhang and Runji Lin and Bowen Yu and Dayiheng Liu "
        "and Jingren Zhou and Junyang Lin",
        2025, "2501.07301",
    ),
    "pure": Paper(
        "cheng2025stop",
        "Stop Summation: Min-Form Credit Assignment Is All Process Reward Model Needs for Reasoning",
        "Jie Cheng and others",
        2025, "2504.15275",
    ),
    "prime": Paper(
        "cui2025process",
        "Process Reinforcement through Implicit Rewards",
        "Ganqu Cui and Lifan Yuan and Zefan Wang and Hanbin Wang and others",
        2025, "2502.01456",
    ),
    "psipo": Paper(
        "azar2023general",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele Calandriello and "
        "Michal Valko and Rémi Munos",
        2023, "2310.12036",
    ),
    "gpo": Paper(
        "tang2024generalized",
        "Generalized Preference Optimization: A Unified Approach to Offline Alignment",
        "Yunhao Tang and Zhaohan Daniel Guo and Zeyu Zheng and Daniele Calandriello and Rémi Munos and Mark Rowland "
        "and Pierre Harvey Richemond and Michal Valko and Bernardo Ávila Pires and Bilal Piot",
        2024, "2402.05749",
    ),
    "dpo": Paper(
        "rafailov2023direct",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning and "
        "Chelsea Finn",
        2023, "2305.18290",
    ),
    "nemotron_4": Paper(
        "nvidia2024nemotron",
        "Nemotron-4 340B Technical Report",
        "{Nvidia}",
        2024, "2406.11704",
    ),
    "eva": Paper(
        "ye2024scalable",
        "Scalable Reinforcement Post-Training Beyond Static Human Prompts: Evolving Alignment via Asymmetric "
        "Self-Play",
        "Ziyu Ye and Rishabh Agarwal and Tianqi Liu and Rishabh Joshi and Sarmishta Velury and Quoc V. Le and Qijun "
        "Tan and Yuan Liu",
        2024, "2411.00062",
    ),
    "rpo": Paper(
        "sun2025rewardaware",
        "Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
        "Shengyang Sun and others",
        2025, "2502.00203",
    ),
    "odpo": Paper(
        "amini2024direct",
        "Direct Preference Optimization with an Offset",
        "Afra Amini and Tim Vieira and Ryan Cotterell",
        2024, "2402.10571",
    ),
    "dpop": Paper(
        "pal2024smaug",
        "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
        "Arka Pal and Deep Karkhanis and Samuel Dooley and Manley Roberts and Siddartha Naidu and Colin White",
        2024, "2402.13228",
    ),
    "length_dpo": Paper(
        "park2024disentangling",
        "Disentangling Length from Quality in Direct Preference Optimization",
        "Ryan Park and Rafael Rafailov and Stefano Ermon and Chelsea Finn",
        2024, "2403.19159",
    ),
    "simpo": Paper(
        "meng2024simpo",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Yu Meng and Mengzhou Xia and Danqi Chen",
        2024, "2405.14734",
    ),
    "rrhf": Paper(
        "yuan2023rrhf",
        "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "Zheng Yuan and Hongyi Yuan and Chuanqi Tan and Wei Wang and Songfang Huang and Fei Huang",
        2023, "2304.05302",
    ),
    "bco": Paper(
        "jung2024binary",
        "Binary Classifier Optimization for Large Language Model Alignment",
        "Seungjae Jung and Gunsoo Han and Daniel Wontae Nam and Kyoung-Woon On",
        2024, "2404.04656",
    ),
    "sppo": Paper(
        "wu2024selfplay",
        "Self-Play Preference Optimization for Language Model Alignment",
        "Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu",
        2024, "2405.00675",
    ),
    "chipo": Paper(
        "huang2024correcting",
        "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared "
        "Preference Optimization",
        "Audrey Huang and Wenhao Zhan and Tengyang Xie and Jason D. Lee and Wen Sun and Akshay Krishnamurthy and "
        "Dylan J. Foster",
        2024, "2407.13399",
    ),
    "cal_dpo": Paper(
        "xiao2024caldpo",
        "Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment",
        "Teng Xiao and Yige Yuan and Huaisheng Zhu and Mingxiao Li and Vasant G. Honavar",
        2024, "2412.14516",
    ),
    "beta_dpo": Paper(
        "wu2024betadpo",
        "β-DPO: Direct Preference Optimization with Dynamic β",
        "Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jinyang Gao and Bolin Ding and Xiang Wang "
        "and Xiangnan He",
        2024, "2407.08639",
    ),
    "kl_approx": Paper(
        "schulman2020approximating",
        "Approximating KL Divergence",
        "John Schulman",
        2020,
        source={"url": "http://joschu.net/blog/kl-approx.html"},
    ),
    "better_kl": Paper(
        "amini2025better",
        "Better Estimation of the KL Divergence Between Language Models",
        "Afra Amini and Tim Vieira and Ryan Cotterell",
        2025, "2504.10637",
    ),
    "kl_pitfalls": Paper(
        "tang2025pitfalls",
        "On a few pitfalls in KL divergence gradient estimation for RL",
        "Yunhao Tang and Rémi Munos",
        2025, "2506.09477",
    ),
    "adaptive_kl": Paper(
        "ziegler2019finetuning",
        "Fine-Tuning Language Models from Human Preferences",
        "Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and Dario Amodei and "
        "Paul Christiano and Geoffrey Irving",
        2019, "1909.08593",
    ),
    "deepseek_v3_2": Paper(
        "deepseekai2025deepseekv32",
        "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
        "{DeepSeek-AI}",
        2025, "2512.02556",
    ),
    "rft": Paper(
        "yuan2023scaling",
        "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models",
        "Zheng Yuan and Hongyi Yuan and Chengpeng Li and Guanting Dong and Keming Lu and Chuanqi Tan and Chang Zhou "
        "and Jingren Zhou",
        2023,
        "2308.01825",
    ),
    "self_consistency": Paper(
        "wang2022selfconsistency",
        "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
        "Xuezhi Wang and Jason Wei and Dale Schuurmans and Quoc Le and Ed Chi and Sharan Narang and Aakanksha "
        "Chowdhery and Denny Zhou",
        2022,
        "2203.11171",
    ),
    "weighted_vote": Paper(
        "li2022making",
        "Making Large Language Models Better Reasoners with Step-Aware Verifier",
        "Yifei Li and Zeqi Lin and Shizhuo Zhang and Qiang Fu and Bei Chen and Jian-Guang Lou and Weizhu Chen",
        2022,
        "2206.02336",
    ),
    "test_time_compute": Paper(
        "snell2024scaling",
        "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters",
        "Charlie Snell and Jaehoon Lee and Kelvin Xu and Aviral Kumar",
        2024,
        "2408.03314",
    ),
    "codex": Paper(
        "chen2021evaluating",
        "Evaluating Large Language Models Trained on Code",
        "Mark Chen and Jerry Tworek and Heewoo Jun and Qiming Yuan and others",
        2021,
        "2107.03374",
    ),
}
# fmt: on
